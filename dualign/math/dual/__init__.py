"""The dual of constrained alignment, solved on samples of the reference policy before any policy is
trained.

Problem: max_pi E[r] - beta KL(pi || pi_ref) subject to E[c] <= d. With n samples y_i ~ pi_ref(.|x)
of N prompts,

    V_lambda(x) = beta log mean_i exp((r_i - lambda c_i) / beta)                  the soft value
    D(lambda)   = mean_x V_lambda(x) + lambda d                                   the dual function
    D'(lambda)  = d - C(lambda),   C(lambda) = mean_x sum_i w_i c_i
    D''(lambda) = mean_x Var_w(c) / beta >= 0,   w = softmax_i((r_i - lambda c_i) / beta)

so C falls in lambda and the multiplier is the root of C(lambda) = d, or 0 where the limit is slack.
MoCAN (2405.19544) descends D by projected gradient; Newton needs a handful of steps. All arrays
have shape [prompts, samples] unless told otherwise.

`tilt` has weights, means and divergence at a given multiplier, `tail` the tail of a distribution;
`root` finds the multiplier, `solution` adds its interval and the frontier, `margin` leaves room for
a certificate, `joint` solves several constraints at once; `reach` and `advice` say what would help
where samples do not suffice. Import from the module that defines a name: a stage then depends on
those alone that it needs."""
