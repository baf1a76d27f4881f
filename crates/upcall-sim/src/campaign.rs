//! Many worlds, one after the other, and what is said of them.
//!
//! Always true: a campaign is only right if each of its canaries was noticed, if the worlds
//! that ran twice did the same twice, and if every kind of fault happened.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::Once;
use std::time::Instant;

use crate::coverage::Coverage;
use crate::medium::Canary;
use crate::plants::Plant;
use crate::simulation::Simulation;

/// What a world came to.
#[derive(Debug)]
pub struct Outcome {
    /// What is wrong; None: nothing.
    pub wrong: Option<String>,
    /// What happened last.
    pub last: Vec<String>,
    pub digest: (u64, u64),
    pub coverage: Coverage,
    /// The canary did what it should be noticed for.
    pub canary_sang: bool,
}

thread_local! {
    /// A world runs on this thread.
    static RUNS: Cell<bool> = const { Cell::new(false) };
    /// What its panic said, instead of saying it on the terminal.
    static SAID: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps panics of worlds off the terminal: here they are how a world says what is wrong.
fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !RUNS.get() {
                return others(info);
            }
            let text = info.payload_as_str().unwrap_or("a panic");
            let place = info.location().map(|at| format!(" [{}:{}]", at.file(), at.line()));
            SAID.set(text.to_owned() + &place.unwrap_or_default());
        }));
    });
}

/// What is done to a world that it must not survive, and whether it is watched.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    pub canary: Option<Canary>,
    pub plant: Option<Plant>,
    /// All that happens is printed.
    pub prints: bool,
}

/// Runs one world.
pub fn run_world(seed: u64, run: Run) -> Outcome {
    let Run { canary, plant, prints } = run;
    listen();
    Plant::set(plant);
    RUNS.set(true);
    let mut simulation = None;
    let run = catch_unwind(AssertUnwindSafe(|| {
        let simulation = simulation.insert(Simulation::new(seed, canary));
        simulation.trace.prints = prints;
        simulation.run();
    }));
    RUNS.set(false);
    Plant::set(None);
    let wrong = run.is_err().then(|| SAID.take());
    let Some(simulation) = simulation else {
        let (last, coverage) = (Vec::new(), Coverage::default());
        return Outcome { wrong, last, digest: (0, 0), coverage, canary_sang: false };
    };
    Outcome {
        wrong,
        last: simulation.trace.last(),
        digest: simulation.trace.digest(),
        coverage: simulation.coverage.clone(),
        canary_sang: simulation.canary_sang(),
    }
}

/// The first of so many worlds in which a planted bug shows, and what it says.
pub fn find_plant(plant: Plant, first: u64, worlds: u64) -> Option<(u64, String)> {
    (first..first + worlds).find_map(|seed| {
        let outcome = run_world(seed, Run { plant: Some(plant), ..Run::default() });
        outcome.wrong.map(|wrong| (seed, wrong))
    })
}

/// The commit that this was built from, if it can be known.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(commit) => {
            let clean = git(&["status", "--porcelain"]).is_some_and(|changes| changes.is_empty());
            if clean { commit } else { commit + "+" }
        }
        None => "unknown".to_owned(),
    }
}

/// What a campaign shall do.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    pub first: u64,
    pub seeds: u64,
}

/// What a campaign came to.
#[derive(Debug)]
pub struct Report {
    /// The first seed.
    pub first: u64,
    pub seeds: u64,
    pub coverage: Coverage,
    pub seconds: f64,
    /// Each a sentence, with how to replay it.
    pub wrong: Vec<String>,
}

/// So many worlds are tried for each canary before it counts as not noticed.
const CANARY_WORLDS: u64 = 30;
/// One world in so many runs twice.
const TWICE_IN: u64 = 100;
/// A campaign ends early after so many failures: the next ones say the same.
const WRONG_MAX: usize = 5;

impl Campaign {
    pub fn run(self) -> Report {
        let start = Instant::now();
        let mut report = Report {
            first: self.first,
            seeds: 0,
            coverage: Coverage::default(),
            seconds: 0.0,
            wrong: Vec::new(),
        };
        for seed in self.first..self.first + self.seeds {
            report.run_seed(seed);
            if report.wrong.len() >= WRONG_MAX {
                break;
            }
        }
        for canary in Canary::ALL {
            report.run_canary(canary, self.first);
        }
        if self.seeds >= 200 {
            report.check_coverage();
        }
        report.seconds = start.elapsed().as_secs_f64();
        report
    }
}

impl Report {
    fn run_seed(&mut self, seed: u64) {
        let outcome = run_world(seed, Run::default());
        self.seeds += 1;
        self.coverage.merge(&outcome.coverage);
        if let Some(wrong) = outcome.wrong {
            self.wrong.push(format!("seed {seed}: {wrong}\n{}", outcome.last.join("\n")));
        } else if seed.is_multiple_of(TWICE_IN) {
            self.coverage.count("worlds run twice");
            let again = run_world(seed, Run::default());
            if again.digest != outcome.digest {
                self.wrong.push(format!(
                    "seed {seed} did not do the same twice: {:?}, then {:?}",
                    outcome.digest, again.digest
                ));
            }
        }
    }

    /// A canary must be noticed.
    fn run_canary(&mut self, canary: Canary, first: u64) {
        for seed in first..first + CANARY_WORLDS {
            let outcome = run_world(seed, Run { canary: Some(canary), ..Run::default() });
            if outcome.wrong.is_some() && outcome.canary_sang {
                self.coverage.count(&format!("canary noticed: {}", canary.name()));
                return;
            }
        }
        self.wrong.push(format!(
            "the canary {} was not noticed in {CANARY_WORLDS} worlds from seed {first}: the \
             checkers do not see",
            canary.name()
        ));
    }

    /// Every kind of fault must have happened, in proportion to the worlds.
    fn check_coverage(&mut self) {
        for (what, least_per_1000) in LEAST {
            let count = self.coverage.sum(what);
            if count * 1000 < least_per_1000 * self.seeds {
                self.wrong.push(format!(
                    "\"{what}\" happened {count} times in {} worlds: the worlds have gone narrow",
                    self.seeds
                ));
            }
        }
    }

    /// The line for the ledger.
    pub fn ledger(&self) -> String {
        let counts = self.coverage.iter().filter(|(what, _)| !what.starts_with("request"));
        let faults: Vec<String> =
            counts.map(|(what, count)| format!("\"{what}\":{count}")).collect();
        format!(
            "ledger: {{\"kind\":\"sim\",\"from\":{},\"seeds\":{},\"requests\":{},\"faults\":{{{}}},\
             \"seconds\":{:.1},\"commit\":\"{}\",\"result\":\"{}\"}}",
            self.first,
            self.seeds,
            self.coverage.get("requests completed"),
            faults.join(","),
            self.seconds,
            commit(),
            if self.wrong.is_empty() { "ok" } else { "failed" },
        )
    }
}

/// What must happen at least so often in 1,000 worlds.
const LEAST: [(&str, u64); 63] = [
    ("fault: filter death", 500),
    ("filter death: ", 300),
    ("filter death: changer HalfChanged", 5),
    ("filter death: changer DoneHalfChanged", 5),
    ("filter death: holder Held", 10),
    ("filter death: splitter Issued", 10),
    ("filter death: journal ResultTaken", 10),
    ("filter gone: hold", 300),
    ("filter gone: bypass", 30),
    ("filter gone: fail", 30),
    ("filter gone: detach", 20),
    ("fault: filter hang", 200),
    ("fault: filter nonsense", 200),
    ("fault: broken ring", 30),
    ("fault: failing start", 50),
    ("seen: quarantine", 20),
    ("seen: delivered again", 300),
    ("fault: ring stop", 300),
    ("fault: guest reset", 200),
    ("fault: slow store", 300),
    ("fault: failing store", 200),
    ("fault: power cut", 200),
    ("worker death: at a store", 300),
    ("worker death: between", 50),
    ("worker death: while", 10),
    ("store error: read", 200),
    ("store error: write", 200),
    ("store error: flush", 50),
    ("request: discard", 1000),
    ("request: write-zeroes", 1000),
    ("seen: read answered by a filter", 200),
    ("seen: cancel of a held request", 50),
    ("seen: gap marked", 300),
    ("fault: gap not marked", 2),
    ("checked: sectors missed and recorded", 300),
    ("migration: begun", 300),
    ("migration: amid a change of chains", 20),
    ("migration: cancelled", 80),
    ("migration: failed at its end", 50),
    ("migration: finished", 150),
    ("migration: pages logged late", 1000),
    ("migration: ring with something left", 10),
    ("migration: worker death after rings stopped", 5),
    ("migration: worker death while logging", 15),
    ("migration: worker death while rings stop", 10),
    ("chain change: begun", 500),
    ("chain change: of several disks", 50),
    ("chain change: attached", 300),
    ("chain change: detached", 200),
    ("chain change: replaced", 300),
    ("chain change: reordered", 3),
    ("chain change: made", 100),
    ("chain change: trial stood", 50),
    ("chain change: trial failed", 50),
    ("chain change: taken back", 40),
    ("chain change: not written down", 1),
    ("chain change: stuck", 3),
    ("chain change: a dead filter leaves", 50),
    ("chain change: given up at stun", 50),
    ("chain change: given up at enter", 10),
    ("chain change: given up at commit", 10),
    ("worker death: with a change on its way", 50),
    ("worker death: with a change on trial", 5),
];
