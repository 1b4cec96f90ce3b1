"""The draft families."""
