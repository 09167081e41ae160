"""Bridges to other libraries; imported on demand."""
