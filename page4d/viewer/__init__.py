"""A page in the browser that shows a dynamic scene over time, and the same as one HTML file. Needs the package viser."""

from .options import ViewOptions
from .page import Page
from .recording import check_html, save_html

__all__ = ["Page", "ViewOptions", "check_html", "save_html"]
