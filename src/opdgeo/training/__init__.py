"""Training the arms on TRL: who writes the tokens, what credit each gets, and what a run leaves behind."""

import os

# TRL and transformers report their use over the network; a training run on somebody's machine should not.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
