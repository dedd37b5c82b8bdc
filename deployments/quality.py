"""What `switchyard bench quality` needs of model/; the command line may not import model itself."""

from model.demo.corpus import CorpusError
from model.demo.quality import Quality, measure

__all__ = ["CorpusError", "Quality", "measure"]
