"""visionpeft: any parameter-efficient fine-tuning method on any vision backbone."""

from visionpeft.errors import DeadAdapterError, VisionPEFTError

__version__ = "0.1.0"
__all__ = ["DeadAdapterError", "VisionPEFTError"]
