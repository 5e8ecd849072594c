"""What holds for all tests: what kind a test is and what its machine can do is said by markers, not by its folder."""

from __future__ import annotations

import os

import hypothesis

# Two noisy cores: a slow example says nothing about the code. In CI the same examples come every time, so that a red run
# is red because of its change; locally they are new each time. HYPOTHESIS_PROFILE=thorough looks further.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))
