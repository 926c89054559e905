"""Schedules: a hyperparameter as a function of the number of applied steps."""

from gradfilter.schedules._schedules import constant as constant
from gradfilter.schedules._schedules import cosine as cosine
from gradfilter.schedules._schedules import linear as linear
from gradfilter.schedules._schedules import plateau as plateau
from gradfilter.schedules._schedules import poly as poly
from gradfilter.schedules._schedules import proportional as proportional
from gradfilter.schedules._schedules import step as step
