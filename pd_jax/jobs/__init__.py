"""Jobs: files of documents and the questions about them, answered into a file that an interruption does not harm."""

from pd_jax.jobs.answers import Progress, Settings, answer_batches, answer_requests, open_answers
from pd_jax.jobs.load import load_decoder
from pd_jax.jobs.requests import Request, read_requests

__all__ = [
    "Progress",
    "Request",
    "Settings",
    "answer_batches",
    "answer_requests",
    "load_decoder",
    "open_answers",
    "read_requests",
]
