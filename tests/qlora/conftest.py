"""Training on weights of 4 bits: `make test-qlora`. Without bitsandbytes nothing is collected here."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("bitsandbytes") else ["test_*.py"]
