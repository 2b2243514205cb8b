"""A question of a stranger's: do the prompts of one class lie farther apart along the direction after the fine-tune?"""

import numpy as np

import tl_em as em


class Spread(em.Question):
    name, words, unit, smallest = "spread", ("wider", "narrower"), "own gaps", 0.05
    asks = "Do prompts of one class lie farther apart along the direction after the fine-tune?"
    measured = "Standard deviation of the projections within the classes, tuned minus base, in own gaps."

    def measure(self, case):
        def spread(projected, v, w):  # v, w: how often each prompt of a class was drawn, [resample, prompt]
            both = ((v, projected.positive), (w, projected.negative))
            variances = [u @ x**2 / u.sum(-1) - (u @ x / u.sum(-1)) ** 2 for u, x in both]
            return np.sqrt(np.mean(np.maximum(variances, 0), axis=0))

        def along_each(reading):
            variances = [(x @ case.controls().T).var(0) for x in (reading.positive, reading.negative)]
            return np.sqrt(np.mean(variances, axis=0))

        effect, beyond_benign = case.changed(spread)
        null = (along_each(case.tuned) - along_each(case.base)) / case.own_gap.value
        return case.finding(self, effect, controls=null, benign=beyond_benign)
