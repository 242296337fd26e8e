//! The draws themselves: a run of rows from each heavy list, two short runs for each stratum of light ones.

use super::{Plan, Planner, Stretch};
use crate::index::gather::Run;
use crate::index::random::Rng;

impl Planner<'_> {
    pub(super) fn draw(&self, query: usize, plan: &mut Plan, rng: &mut Rng) {
        let lists = self.index.lists();
        let block = self.request.block;
        let mut light = Vec::new();
        let mut cumulated = Vec::new();
        let mut total = 0.0;
        for (list, &draws) in self.draws.iter().enumerate() {
            if self.whole[list] || draws <= 0.0 {
                continue;
            }
            if draws >= f64::from(2 * block) {
                // Rounded at random, so that the mean is kept; the variance is that of the rows taken.
                let len = (draws + rng.uniform()).floor().min(lists[list].n as f64) as u32;
                let stretch = self.stretch(query, list, len.max(2), 0.0, plan, rng);
                plan.heavy.push(stretch);
            } else {
                total += draws;
                light.push(list);
                cumulated.push(total);
            }
        }
        if light.is_empty() {
            return;
        }
        let strata = (total / f64::from(2 * block)).round().max(1.0);
        let mut first = 0;
        for stratum in 0..strata as usize {
            // Both points of a stratum lie behind its beginning.
            while first + 1 < light.len() && cumulated[first] <= stratum as f64 / strata * total {
                first += 1;
            }
            for _ in 0..2 {
                let point = (stratum as f64 + rng.uniform()) / strata * total;
                let behind = cumulated[first..].iter().take_while(|&&end| end <= point).count();
                let at = (first + behind).min(light.len() - 1);
                let list = light[at];
                let len = block.min(lists[list].n as u32);
                // n mean(e) / (p G) with p = draws/total.
                let share = self.draws[list] * strata / total;
                let stretch = self.stretch(query, list, len, share, plan, rng);
                plan.light.push(stretch);
            }
        }
    }

    fn stretch(
        &self,
        query: usize,
        list: usize,
        len: u32,
        share: f64,
        plan: &mut Plan,
        rng: &mut Rng,
    ) -> Stretch {
        let entry = &self.index.lists()[list];
        let start = rng.below(entry.n);
        let run = plan.runs.len() as u32;
        let before = (entry.n - start).min(u64::from(len)) as u32;
        plan.runs.push(Run { query: query as u32, start: entry.start + start, len: before });
        if before < len {
            plan.runs.push(Run { query: query as u32, start: entry.start, len: len - before });
        }
        Stretch { list: list as u32, run, len, share, to_mean: 0.0, variance: 0.0 }
    }
}
