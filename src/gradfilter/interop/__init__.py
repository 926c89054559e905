"""For existing training loops: PyTorch's habits, in place, on the pure core."""

from gradfilter.interop._gaf import step_GAF as step_GAF
from gradfilter.interop._gaf import step_gaf as step_gaf
from gradfilter.interop._gaf_training import train_GAF as train_GAF
from gradfilter.interop._gaf_training import train_gaf as train_gaf
