from poise.guard.responses.dispatch import carry_out as carry_out
