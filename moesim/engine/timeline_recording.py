"""stub"""
from typing import Any
StepRecord: Any = None
recorded_timeline: Any = None
