"""Presets, one module a family: values for ordinary weights (training-free) and for trained students, kept apart."""

from blade_pipelines.presets.wan import STUDENT, TRAINING_FREE

__all__ = ["STUDENT", "TRAINING_FREE"]
