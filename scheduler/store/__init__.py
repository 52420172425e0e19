"""What the control plane must not forget: SQLAlchemy Core over SQLite or PostgreSQL."""
