"""What a training or a served memory takes, before any of it is started: bytes, operations, time.

Nothing is allocated. Times follow from how fast the machines are, which is given.
"""

from memorizing.planning.serving import ServingHardware, plan_serving
from memorizing.planning.training import TrainingHardware, plan_training

__all__ = ["ServingHardware", "TrainingHardware", "plan_serving", "plan_training"]
