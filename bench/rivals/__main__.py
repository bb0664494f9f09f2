"""A worker of the bench."""

from . import worker

worker()
