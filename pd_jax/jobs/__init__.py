"""Jobs: files of documents answered into a file that an interruption does not harm, and what a terminal shows."""

from pd_jax.jobs.answers import Progress, Settings, answer_batches, answer_requests, open_answers
from pd_jax.jobs.lanes import Lanes, one_line
from pd_jax.jobs.load import load_decoder
from pd_jax.jobs.requests import Request, read_requests

__all__ = [
    "Lanes",
    "Progress",
    "Request",
    "Settings",
    "answer_batches",
    "answer_requests",
    "load_decoder",
    "one_line",
    "open_answers",
    "read_requests",
]
