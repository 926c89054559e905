"""Use the library in existing training loops: in place, with PyTorch's conventions."""

from typing import TYPE_CHECKING

from gradfilter.interop._agc import AGC as AGC
from gradfilter.interop._agc import SGD_AGC as SGD_AGC
from gradfilter.interop._agc import Adam_AGC as Adam_AGC
from gradfilter.interop._agc import AdamW_AGC as AdamW_AGC
from gradfilter.interop._agc import RMSprop_AGC as RMSprop_AGC
from gradfilter.interop._filtered import Filtered as Filtered
from gradfilter.interop._filtered import StepResult as StepResult
from gradfilter.interop._frameworks import __getattr__ as __getattr__
from gradfilter.interop._gaf import step_GAF as step_GAF
from gradfilter.interop._gaf import step_gaf as step_gaf
from gradfilter.interop._gaf import train_GAF as train_GAF
from gradfilter.interop._gaf import train_gaf as train_gaf
from gradfilter.interop._gsam import GSAM as GSAM
from gradfilter.interop._published_schedulers import CosineScheduler as CosineScheduler
from gradfilter.interop._published_schedulers import LinearScheduler as LinearScheduler
from gradfilter.interop._published_schedulers import PolyScheduler as PolyScheduler
from gradfilter.interop._published_schedulers import ProportionScheduler as ProportionScheduler
from gradfilter.interop._published_schedulers import StepScheduler as StepScheduler
from gradfilter.interop._sam import SAM as SAM

if TYPE_CHECKING:
    from gradfilter.interop._lightning import FilteredModule as FilteredModule
    from gradfilter.interop._transformers import FilteredTrainer as FilteredTrainer
