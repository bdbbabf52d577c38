from fastkd.losses import *
from fastkd.feature_losses import *
from fastkd.layers import *
from fastkd.teacher import *
from fastkd.online_teachers import *
from fastkd.callback import *
from fastkd.metrics import *
from fastkd.plots import *
