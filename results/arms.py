"""What is run and compared: the algorithms, their variants, and the claims that they test. A new algorithm is a line of ALGOS.

Everything else in results/ takes names, titles and arguments from here.
"""

from typing import NamedTuple


class Arm(NamedTuple):
    """One arm of a comparison: a script of algos/ with arguments.

    offline: the kind of offline checkpoint that it makes or starts from; arms of one kind share the checkpoints. None: its own.
    """

    title: str  # in tables and figures
    script: str
    arguments: str = ""
    offline: str | None = None


ALGOS = {  # a control is an argument
    "cpq": Arm("CPQ (offline)", "cpq", offline="cpq"),
    "bc_safe": Arm("BC-Safe (offline)", "bc_safe", offline="bc_safe"),
    "bc_safe+best": Arm("the clone of what CPQ clones (offline)", "bc_safe", "--data best"),
    "bear_lag": Arm("BEAR-Lag (offline)", "bear_lag", offline="bear_lag"),
    "marvel": Arm("Marvel", "marvel", offline="cpq"),
    "sac_lag": Arm("SAC-Lag from scratch", "sac_lag"),
    "naive_o2o": Arm("naive finetuning", "naive_o2o", offline="cpq"),
    "jsrl": Arm("JSRL", "jsrl", offline="cpq"),
    "pex": Arm("PEX", "pex", offline="cpq"),
    "so2": Arm("SO2", "so2", offline="cpq"),
    "wsrl": Arm("WSRL", "wsrl", offline="cpq"),
    "cal": Arm("CAL", "cal"),  # four cost critics: offline checkpoints of its own
    "marvel+fqe": Arm("Marvel, plain fitted Q", "marvel", "--vpa-alpha-reward 0 --vpa-alpha-cost 0", "cpq"),
    "marvel+fresh": Arm("Marvel, fresh critics", "marvel", "--critics fresh", "cpq"),
    "marvel+dual": Arm("Marvel, dual ascent", "marvel", "--lagrangian dual", "cpq"),
    "marvel+pid": Arm("Marvel, fixed PID", "marvel", "--lagrangian pid", "cpq"),
    "marvel+pid10": Arm("Marvel, fixed PID, gains x10", "marvel", "--lagrangian pid10", "cpq"),
    "marvel+mixed": Arm("Marvel, mixed replay", "marvel", "--replay mixed", "cpq"),
    "marvel+bear_lag": Arm("Marvel from BEAR-Lag", "marvel", "--offline bear_lag", "bear_lag"),
    "naive_o2o+bear_lag": Arm("naive from BEAR-Lag", "naive_o2o", "--offline bear_lag", "bear_lag"),
    # marvel --vpa-steps 0 is the same
    "naive_o2o+apid": Arm("naive finetuning, adaptive PID", "naive_o2o", "--lagrangian apid", "cpq"),
}
OFFLINE = ("cpq", "bc_safe", "bc_safe+best", "bear_lag", "cpq+published")  # without an online phase
COMPARED = tuple(ALGOS)  # what a bare sweep runs and the comparisons show; what follows has tables of its own
PLAIN = [name for name in ALGOS if "+" not in name]
CONTROLS = ["marvel", *(name for name in ALGOS if "+" in name and name not in OFFLINE)]
MULTIPLIERS = ["marvel", "marvel+pid", "marvel+pid10", "marvel+dual"]

# The paper's own configuration, all arms from one offline checkpoint, of the suite's offline budget or of OSRL's. 500 episodes:
# the release has more on HalfCheetah only (5,000).
BUDGETS = {  # name: (the offline phase, its arguments)
    "release": ("10,000 steps of 256", "--offline-steps 10000 --offline-batch-size 256"),
    "published": ("100,000 steps of 512, OSRL's", "--offline-steps 100000 --offline-batch-size 512"),
}
ENTROPY = "--vpa-entropy sample --vpa-alpha-reward 0.002 --vpa-alpha-cost 0.001"  # the paper's; the release runs without
RELEASE = {  # name, with {} for the budget
    "cpq+{}": Arm("CPQ (offline)", "cpq"),
    "naive_o2o+{}": Arm("naive finetuning, adaptive PID", "naive_o2o"),
    "marvel+{}": Arm("Marvel", "marvel", ENTROPY),
    "marvel+{}+fqe": Arm("Marvel without entropy terms", "marvel"),
}
for _budget, (_what, _steps) in BUDGETS.items():
    for _name, _arm in RELEASE.items():
        if _arm.script == "cpq" and _budget == "release":  # the finetuners' rows say how it ends
            continue
        _online = "" if _arm.script == "cpq" else "--iterations 100 "
        _arguments = f"--preset release {_online}{_steps} {_arm.arguments}".strip()
        ALGOS[_name.format(_budget)] = Arm(f"{_arm.title}; release, offline {_what}", _arm.script, _arguments, f"cpq+{_budget}")

# What carries the results: what the suite adds to the paper, taken away or alone, for Marvel and for naive finetuning with its controller.
COLD = "--actor-warmup 0 --init-multiplier 0"  # no warm-up of the actor nor of lambda
LADDER = {  # rung: (what it is, arguments, whose offline checkpoints)
    "bare": ("bare: no anchor, warm-up, reserve", f"--anchor-weight 0 --reserve 0 {COLD}", "cpq"),
    "warmup": ("bare + warm-up", "--anchor-weight 0 --reserve 0", "cpq"),
    "anchor": ("bare + anchor", f"--reserve 0 {COLD}", "cpq"),
    "reserve": ("bare + reserve", f"--anchor-weight 0 {COLD}", "cpq"),
    "": ("the suite: all three", "", "cpq"),
    "nocloning": ("the suite, CPQ without cloning", "--cloning-weight 0", "cpq+nocloning"),
    "bc": ("the suite, from a clone (BC-Safe)", "--offline bc_safe", "bc_safe"),
    "lost": ("the suite, without the odometer", "--no-odometer", "cpq+lost"),
    "blind": ("the suite, critics that do not see x", "--no-privileged-critic", "cpq+blind"),
}
RUNGS = {name: ALGOS[name] for name in ("marvel", "naive_o2o+apid")}  # of which LADDER has variants
for _rung, (_what, _more, _offline) in LADDER.items():
    for _name, _arm in RUNGS.items():
        if _rung:
            ALGOS[f"{_name}+{_rung}"] = Arm(f"{_arm.title}; {_what}", _arm.script, f"{_arm.arguments} {_more}".strip(), _offline)

CLAIMS = [  # (claim, what is said to be better, than what[, by which number if not by "final"])
    ("Pre-alignment helps finetuning: Marvel without it is naive finetuning with its controller", "marvel", "naive_o2o+apid"),
    ("... from a clone, which has no critics", "marvel+bc", "naive_o2o+apid+bc"),
    ("... from CPQ without cloning", "marvel+nocloning", "naive_o2o+apid+nocloning"),
    ("Its entropy terms help: plain fitted Q is not enough", "marvel", "marvel+fqe"),
    ("The pretrained critics help: fresh ones are not enough", "marvel", "marvel+fresh"),
    ("Adaptive gains are better than fixed ones", "marvel", "marvel+pid"),
    ("... and not merely larger: than fixed gains ten times as high", "marvel", "marvel+pid10"),
    ("... than dual ascent", "marvel", "marvel+dual"),
    ("Finetuning improves on the offline policy", "marvel", "cpq"),
    ("Marvel is better than naive finetuning", "marvel", "naive_o2o"),
    ("... and neither has anchor, warm-up or reserve", "marvel+bare", "naive_o2o+apid+bare"),
    ("... in the paper's own configuration", "marvel+release", "naive_o2o+release"),
    ("... as released, without entropy terms", "marvel+release+fqe", "naive_o2o+release"),
    ("Anchor, warm-up and reserve make Marvel's training safer", "marvel", "marvel+bare", "regret"),
    ("... and that of naive finetuning", "naive_o2o+apid", "naive_o2o+apid+bare", "regret"),
    ("The warm-up alone makes Marvel's training safer", "marvel+warmup", "marvel+bare", "regret"),
    ("... and the anchor alone", "marvel+anchor", "marvel+bare", "regret"),
    ("... and the reserve alone", "marvel+reserve", "marvel+bare", "regret"),
    ("All three together make it safer than the warm-up alone", "marvel", "marvel+warmup", "regret"),
    ("The cloning in CPQ helps Marvel", "marvel", "marvel+nocloning"),
    ("Marvel is better from CPQ than from a clone", "marvel", "marvel+bc"),
    ("The odometer helps Marvel", "marvel", "marvel+lost"),
    ("Critics that see x help Marvel", "marvel", "marvel+blind"),
    ("Marvel is better than JSRL", "marvel", "jsrl"),
    ("... than PEX", "marvel", "pex"),
    ("... than SO2", "marvel", "so2"),
    ("... than WSRL", "marvel", "wsrl"),
    ("... than CAL", "marvel", "cal"),
    ("... than SAC-Lagrangian from scratch", "marvel", "sac_lag"),
    ("... than behaviour cloning of the safe data", "marvel", "bc_safe"),
    ("CPQ is better than a clone of the trajectories that it clones", "cpq", "bc_safe+best"),
]


def title(name: str) -> str:
    """An arm's title; the name itself of what is no arm, such as a run that starts from somebody's actor."""
    return ALGOS[name].title if name in ALGOS else name
