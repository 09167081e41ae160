"""The ops of pyloss as torch sees them (``torch.ops.pyloss``). Users call pyloss.functional."""
