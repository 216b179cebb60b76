"""The world behind the domain's ports: one file per thing in the world."""
