"""The only translators between the domain and what travels: messages, errors, identities."""
