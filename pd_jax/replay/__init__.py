"""Replays: how answers unfolded, column by column, and whom every token saw, as one HTML file that needs nothing else.

`record` gathers what one sample's replay shows, `write_page` makes the file of some records; page.html is its template.
"""

from pd_jax.replay.page import write_page
from pd_jax.replay.records import MOST_TOKENS, record

__all__ = ["MOST_TOKENS", "record", "write_page"]
