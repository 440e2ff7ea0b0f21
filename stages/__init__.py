"""Where: which worker does which rows (Ray).

Ray reads these variables when it is first imported, so they are set before any module here imports it. A cluster of
our own listens on loopback only (`stages.cluster`), and lets nobody in without its token.
"""

import os

for _name, _value in (
    ("RAY_AUTH_MODE", "token"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("RAY_ENABLE_AUTO_CONNECT", "0"),  # else a thread that still asks after the end starts a second Ray
    ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
    ("RAY_TRAIN_ENABLE_PRINT_PATCH", "0"),
):
    os.environ.setdefault(_name, _value)
