"""Every test runs on the CPU (8 virtual devices, float32) and offline, whatever the machine has."""

import os

os.environ.update(
    JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg"
)
