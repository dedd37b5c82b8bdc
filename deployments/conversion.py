"""What the command line needs of model/ to convert a checkpoint; it may not import model itself."""

from model.conversion import Progress
from model.grok_checkpoint import convert_ckpt0
from model.hub_checkpoint import convert_hub, is_hub_folder
from model.quantised import Precision

__all__ = ["Precision", "Progress", "convert_ckpt0", "convert_hub", "is_hub_folder"]
