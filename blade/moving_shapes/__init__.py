"""The moving-shapes world: captions, rendered frames, and measures of quality taken from pixels alone."""
