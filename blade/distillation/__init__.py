"""Distillation: few-step students that have learned to live with sparsity."""
