"""What `log` was given: step values and epoch means, kept on the device and read only when somebody wants a number.

options.py   in which hooks may be logged, with which options
batch_size.py  the weight of a batch in an epoch's mean
metric.py    one logged name: its last value and its epoch's reduction
objects.py   torchmetrics and its like: metrics that compute their value themselves
shared.py    the same of several processes: the value that all of them came to
exchange.py  how they get there: keys are compared, values added up; reduction.py and gathered.py say what travels
resumed.py   half an epoch's running values on another number of processes
run.py       all names of a run: what `log` files, and what loggers, callbacks and the progress bar read
"""

from __future__ import annotations

from trainkit.metrics.metric import Metric as Metric
from trainkit.metrics.metric import numbers as numbers
from trainkit.metrics.objects import ObjectMetric as ObjectMetric
from trainkit.metrics.options import NO_LOGGING as NO_LOGGING
from trainkit.metrics.options import TRAIN_BATCH as TRAIN_BATCH
from trainkit.metrics.run import Metrics as Metrics
from trainkit.metrics.run import NoMetrics as NoMetrics
from trainkit.metrics.run import Table as Table
from trainkit.metrics.run import check_value as check_value
