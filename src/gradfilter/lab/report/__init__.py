"""``gradfilter report``: write tables and figures of trainings on one page."""
