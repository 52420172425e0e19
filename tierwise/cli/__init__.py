"""The `tierwise` command: thin verbs over the SDK."""
