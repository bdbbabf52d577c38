"What users of fastkd write. All else is imported from its module."
import warnings as _warnings
with _warnings.catch_warnings():  # fastai scripts a function while it is imported, which PyTorch deprecates
    _warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
    import fastai.basics as _basics
from fastkd.losses import BinarySoftTarget, ChannelWise, DecoupledKD, DIST, KDLoss, Logits, Mutual, NormalizedKD, SoftTarget
from fastkd.feature_losses import (ActivationBoundaries, Attention, ChannelWiseFeatures, Cosine, FeatureLoss, FitNet, NST, PKT, RKD, ReviewKD,
                                   Similarity, TrainedFeatureLoss, VID)
from fastkd.layers import get_model_layers
from fastkd.matching import layer_table, match_layers
from fastkd.similarity import layer_similarity
from fastkd.views import Views
from fastkd.cache import Cache
from fastkd.teacher import Teacher
from fastkd.online_teachers import EMATeacher, PeerTeacher
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.metrics import CalibrationError, TeacherAgreement, TeacherKL  # and `kd.teacher_metrics()`
from fastkd.start import init_from_teacher
from fastkd.bodies import LinearProbe, body_learner, distill_learner, linear_probe
from fastkd.size_and_speed import size_and_speed
from fastkd.plots import plot_losses, plot_similarity, plot_temperature, show_attention
from fastkd.experiments.compare import compare
from fastkd.experiments.reports import Runs
from fastkd.experiments.tune import tune

from inspect import cleandoc as _cleandoc
from fastcore.docments import docments as _docments

def _explain(o):
    "Let `help(o)` say what the comments at its arguments say"
    said = [f'    {name}: {d.docment}' for name,d in _docments(o, full=True).items() if d.docment]
    if said: o.__doc__ = '\n'.join([_cleandoc(o.__doc__ or '').split('\n\nArguments:')[0], '', 'Arguments:', *said])

for _o in [*vars().values()]:
    if getattr(_o, '__module__', '').startswith('fastkd.'): _explain(_o)
_explain(KnowledgeDistillationCallback.teacher_metrics)
