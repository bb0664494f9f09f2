"""What an exchange costs, before it is made."""

from .cost import Cost, cost
from .probe import Network, probe

__all__ = ["Cost", "Network", "cost", "probe"]
