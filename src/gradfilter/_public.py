"""The public names of `gradfilter`, except its subpackages, and where each comes from.

Importing this module imports torch. `gradfilter` does so when the first of the names is asked for.
"""

from gradfilter._info import Info as Info
from gradfilter._info import scalars as scalars
from gradfilter._tree import select as select
from gradfilter._types import Params as Params
from gradfilter._types import Transform as Transform
from gradfilter._types import Tree as Tree
from gradfilter.grads._loss import ModelLoss as ModelLoss
from gradfilter.grads._loss import extract as extract
from gradfilter.grads._loss import insert as insert
from gradfilter.grads._loss import model_loss as model_loss
from gradfilter.grads._microbatch import GradFunction as GradFunction
from gradfilter.grads._microbatch import Plan as Plan
from gradfilter.grads._microbatch import microbatch_grads as microbatch_grads
from gradfilter.grads._microbatch import per_sample_grads as per_sample_grads
from gradfilter.grads._stack import ComputedStack as ComputedStack
from gradfilter.grads._stack import DenseStack as DenseStack
from gradfilter.grads._stack import GradStack as GradStack
from gradfilter.schedules._schedules import Schedule as Schedule
from gradfilter.transforms._agreement import agree_filter as agree_filter
from gradfilter.transforms._capture import Captured as Captured
from gradfilter.transforms._capture import capture as capture
from gradfilter.transforms._chain import chain as chain
from gradfilter.transforms._chain import named as named
from gradfilter.transforms._clipping import agc_clip as agc_clip
from gradfilter.transforms._clipping import budget_clip as budget_clip
from gradfilter.transforms._clipping import clip_by_global_norm as clip_by_global_norm
from gradfilter.transforms._clipping import clip_per_row as clip_per_row
from gradfilter.transforms._combinators import freeze as freeze
from gradfilter.transforms._combinators import gate as gate
from gradfilter.transforms._combinators import masked as masked
from gradfilter.transforms._combinators import partition as partition
from gradfilter.transforms._consensus import consensus_filter as consensus_filter
from gradfilter.transforms._ema import ema_of as ema_of
from gradfilter.transforms._ema import ema_params as ema_params
from gradfilter.transforms._hyperparameters import hyperparameters as hyperparameters
from gradfilter.transforms._reducers import aggregate as aggregate
from gradfilter.transforms._reducers import finite_filter as finite_filter
from gradfilter.transforms._reducers import mean_rows as mean_rows
from gradfilter.transforms._reducers import sign_agreement as sign_agreement
from gradfilter.transforms._scheduled import scheduled as scheduled
from gradfilter.transforms._sharpness_aware import gsam_decompose as gsam_decompose
from gradfilter.transforms._sharpness_aware import sam_perturb as sam_perturb
from gradfilter.transforms._state_dict import load_state_dict as load_state_dict
from gradfilter.transforms._state_dict import state_dict as state_dict
from gradfilter.transforms._train_step import TrainState as TrainState
from gradfilter.transforms._train_step import TrainStep as TrainStep
from gradfilter.transforms._train_step import train_step as train_step
from gradfilter.transforms._transform import link as link
from gradfilter.transforms._transform import transform as transform
from gradfilter.transforms._update_rules import adam as adam
from gradfilter.transforms._update_rules import adamw as adamw
from gradfilter.transforms._update_rules import rmsprop as rmsprop
from gradfilter.transforms._update_rules import sgd as sgd
