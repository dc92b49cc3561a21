"""Training on accelerate: one loop, whose every random draw is a function of seed, epoch and step."""

from visionpeft.training.device import make_accelerator
from visionpeft.training.evaluate import predict_logits, score
from visionpeft.training.feed import Feed, LoaderFeed, TensorFeed, make_feed
from visionpeft.training.loop import DivergedError, History, fit
from visionpeft.training.recipe import Recipe

__all__ = [
    "DivergedError", "Feed", "History", "LoaderFeed", "Recipe", "TensorFeed",
    "fit", "make_accelerator", "make_feed", "predict_logits", "score",
]
