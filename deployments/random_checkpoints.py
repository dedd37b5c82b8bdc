"""What `switchyard bench make-model` needs of model/; the command line may not import model itself."""

from model.conversion import Progress
from model.random_checkpoint import RandomCheckpoint, hub_checkpoint
from model.random_grok import grok_checkpoint

__all__ = ["Progress", "RandomCheckpoint", "grok_checkpoint", "hub_checkpoint"]
