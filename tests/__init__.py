import os

#: Whether a run takes samples only, of random cases and of failing calls.  CI takes all.
BRIEF = os.environ.get("HYPOTHESIS_PROFILE", "short") == "short"
