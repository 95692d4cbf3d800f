//! The shipped journal, `facts` and `decide` in a simulated world, under virtual time.
//!
//! Only what carries an action out is simulated ([`server`] does it as the recovery service does): agents, connections, the target, and
//! the disk under the journal. Faults are drawn from a seed: the server dies between any two things that it does, or while it writes its
//! journal; power fails and takes what was not synced; agents die, stop and are rebooted; machines are away, for longer than anybody
//! waits, too; disks are full; users stop, retry and cancel; a second server wants the session. Then the world heals, and at most one
//! retry must deliver everything.
//!
//! A failure names its seed; `PGTHAW_SIMULATION_SEED=N` runs it alone and tells what happened.

mod disk;
mod machines;
mod random;
mod server;
mod world;

use pgthaw_session::{DatabaseState, SessionState, Step};

use machines::{DATABASES, LeftOut};
use world::{End, World};

/// Seeds of a usual run.
const SEEDS: u64 = 10_000;
/// What is left out on purpose must be found within so many.
const ENOUGH: u64 = 2_000;

fn ended(world: World) -> End {
    world.run().unwrap_or_else(|(wrong, _)| panic!("{wrong}"))
}

#[test]
fn whatever_goes_wrong_at_most_one_retry_delivers_everything() {
    if let Some(seed) =
        std::env::var("PGTHAW_SIMULATION_SEED").ok().and_then(|seed| seed.parse().ok())
    {
        return tell(seed);
    }
    let (mut succeeded, mut retried) = (0, 0);
    for seed in 0..SEEDS {
        let end = World::troubled(seed, LeftOut::Nothing).run().unwrap_or_else(|(wrong, _)| {
            panic!("{wrong}; to see it: PGTHAW_SIMULATION_SEED={seed}")
        });
        succeeded += u64::from(end.session.state == SessionState::Succeeded);
        retried += u64::from(end.retries > 0);
    }
    // A world without trouble, or one in which nobody ever succeeds, would prove nothing.
    assert!(succeeded > SEEDS / 2 && succeeded < SEEDS, "{succeeded} of {SEEDS} succeeded");
    assert!(retried > SEEDS / 20, "{retried} of {SEEDS} needed a retry in the end");
}

/// Runs one seed and prints what happens.
fn tell(seed: u64) {
    let mut world = World::troubled(seed, LeftOut::Nothing);
    world.trace = Some(Vec::new());
    match world.run() {
        Ok(end) => eprintln!("seed {seed}: {:?}, {:?}", end.session, end.target),
        Err((wrong, trace)) => panic!("seed {seed}: {wrong}\n{}", trace.join("\n")),
    }
}

/// Each of these is done by the program with care; left out, it must be missed.
#[test]
fn what_is_left_out_on_purpose_is_found() {
    let cases = [
        (LeftOut::Sync("\"placed\""), "the sync of the word of a place"),
        (LeftOut::Sync(""), "every sync of the journal"),
        (LeftOut::WordOfPlace, "the word of a place before it is made"),
        (LeftOut::Marker, "the marker of PostgreSQL's processes"),
        (LeftOut::Lock, "the lock of the journal"),
        (LeftOut::Rename, "the rename of a whole database"),
    ];
    for (left_out, what) in cases {
        let found = (0..ENOUGH).find_map(|seed| {
            let (wrong, _) = World::troubled(seed, left_out).run().err()?;
            Some((seed, wrong))
        });
        let Some((seed, wrong)) = found else { panic!("{what} is not missed in {ENOUGH} seeds") };
        eprintln!("without {what}, seed {seed}: {wrong}");
    }
}

#[test]
fn an_undisturbed_export_succeeds_at_once() {
    for seed in 0..50 {
        let End { session, target, retries, .. } = ended(World::new(seed, LeftOut::Nothing));
        assert_eq!((session.state, session.attempts, retries), (SessionState::Succeeded, 1, 0));
        assert_eq!(session.step, Step::Clean);
        assert_eq!(session.delivered(), DATABASES);
        assert!(target.sealed);
    }
}

#[test]
fn a_cancel_at_any_time_leaves_nothing_or_everything() {
    let (mut canceled, mut succeeded) = (0, 0);
    for seconds in 0..600 {
        let end = ended(World::new(seconds, LeftOut::Nothing).cancel_after(seconds));
        match end.session.state {
            SessionState::Canceled => {
                assert!(end.target.published.is_empty(), "after {seconds} s");
                canceled += 1;
            }
            // A complete export is no longer canceled, whether or not the journal knew of it.
            state => {
                assert_eq!(state, SessionState::Succeeded, "after {seconds} s");
                assert!(end.target.sealed, "after {seconds} s");
                succeeded += 1;
            }
        }
    }
    assert!(canceled > 100 && succeeded > 100, "{canceled} canceled, {succeeded} succeeded");
}

#[test]
fn one_failed_database_does_not_hold_back_the_others() {
    let end = ended(World::new(1, LeftOut::Nothing).failing_once("crm"));
    assert_eq!((end.session.state, end.retries), (SessionState::Succeeded, 1));
    let databases = end.session.databases.as_ref().unwrap();
    assert!(databases.iter().all(|database| database.state == DatabaseState::Delivered));
    // The others came before the retry, which dumped only what was missing.
    assert_eq!(end.session.attempts, 2);
    assert_eq!(
        end.dumps,
        [("crm".to_owned(), 2), ("sales".into(), 1), ("warehouse".into(), 1)].into()
    );
}
