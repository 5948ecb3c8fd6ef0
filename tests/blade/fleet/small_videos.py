"""The smallest videos of the bundled model with its student."""

SMALL = {"height": 32, "width": 32, "frames": 5, "steps": 4, "student": "shapes-4-steps", "device": "cpu"}
"""Fields of a request."""
