"""The command ``gradfilter report``: tables and figures of trainings, on one page."""
