"""Benchmarks: contenders take turns in one process on this machine, and are reported as ratios.

The flags can be had without jax; what runs imports it when it is called.
"""

from pd_jax.benchmarks.ablation import AblateFlags as AblateFlags, ablate as ablate
from pd_jax.benchmarks.attention import AttentionFlags as AttentionFlags, time_attention as time_attention
from pd_jax.benchmarks.columns import ColumnsFlags as ColumnsFlags, time_columns as time_columns
from pd_jax.benchmarks.decoding import DecodeFlags as DecodeFlags, time_decoding as time_decoding
from pd_jax.benchmarks.doctor import DoctorFlags as DoctorFlags, examine as examine
from pd_jax.benchmarks.sessions import SessionsFlags as SessionsFlags, time_sessions as time_sessions
from pd_jax.benchmarks.timing import keep_to as keep_to
from pd_jax.benchmarks.training import TrainFlags as TrainFlags, time_training as time_training
