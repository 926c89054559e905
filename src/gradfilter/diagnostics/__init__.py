"""Measure a network: input Jacobians, curvature, sharpness, noise and agreement of gradients."""

from gradfilter.diagnostics._agreement_plot import plot_agreement as plot_agreement
from gradfilter.diagnostics._input_curvature import InputCurvature as InputCurvature
from gradfilter.diagnostics._input_curvature import loss_curvature as loss_curvature
from gradfilter.diagnostics._jacobian import input_jacobian as input_jacobian
from gradfilter.diagnostics._jacobian import jacobian_norm as jacobian_norm
from gradfilter.diagnostics._operator_norm import OperatorNorm as OperatorNorm
from gradfilter.diagnostics._operator_norm import operator_norm as operator_norm
from gradfilter.diagnostics._parameter_curvature import HessianTop as HessianTop
from gradfilter.diagnostics._parameter_curvature import HessianTrace as HessianTrace
from gradfilter.diagnostics._parameter_curvature import hessian_top as hessian_top
from gradfilter.diagnostics._parameter_curvature import hessian_trace as hessian_trace
from gradfilter.diagnostics._parameter_curvature import sharpness as sharpness
from gradfilter.diagnostics._row_statistics import NoiseScale as NoiseScale
from gradfilter.diagnostics._row_statistics import agreement as agreement
from gradfilter.diagnostics._row_statistics import influence as influence
from gradfilter.diagnostics._row_statistics import noise_scale as noise_scale
