"""Block-sparse attention for video transformers: masks, block selection and attention. Imports nothing from BLADE."""
