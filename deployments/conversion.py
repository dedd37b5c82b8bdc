"""What the command line needs of model/ to convert a checkpoint; it may not import model itself."""

from model.grok_checkpoint import Progress, convert_ckpt0

__all__ = ["Progress", "convert_ckpt0"]
