"""The agent: one node. Light: nothing here imports training or analysis libraries."""
