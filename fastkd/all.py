from fastkd.losses import *
from fastkd.feature_losses import *
from fastkd.layers import *
from fastkd.matching import *
from fastkd.similarity import *
from fastkd.teacher import *
from fastkd.callback import *
from fastkd.plots import *
