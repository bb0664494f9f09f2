"""One HTML page that shows what benches measured and what training runs logged; it needs nothing but a browser."""

from .page import page

__all__ = ["page"]
