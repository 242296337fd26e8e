//! A scan that runs on a thread of its own, under the eyes of Python.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::error::{Error, ErrorKind, Result};
use crate::rows::ShardView;
use crate::scan::reduce::Part;
use crate::scan::{Control, Request, plan, scan_parts as run_scan};

/// How often a running scan looks for Ctrl-C and reports progress.
const TICK: Duration = Duration::from_millis(100);

/// What ended a scan early: an error of its own, or one that Python raised.
pub(super) enum Failure {
    Scan(Error),
    Python(PyErr),
}

/// Runs a scan on a thread of its own while this one answers signals, reports progress and takes the parts.
pub(super) fn watched(
    py: Python<'_>,
    views: &[ShardView<'_>],
    request: &Request<'_>,
    range: Option<Range<usize>>,
    progress: Option<Py<PyAny>>,
    mut take: impl FnMut(Python<'_>, Part) -> PyResult<()> + Send,
) -> std::result::Result<(), Failure> {
    enum Event {
        Part(Part),
        End(Result<()>),
    }
    let control = Control::default();
    let all = plan::segments(views);
    let chosen = range.clone().unwrap_or(0..all.len());
    let rows: u64 = all.get(chosen).unwrap_or(&[]).iter().map(|segment| segment.rows() as u64).sum();
    let total = rows * (request.queries.len() / request.d.max(1)) as u64;
    let tick = |py: Python<'_>| -> PyResult<()> {
        py.check_signals()?;
        if let Some(progress) = &progress {
            progress.call1(py, (control.pairs.load(Ordering::Relaxed), total))?;
        }
        Ok(())
    };
    py.detach(|| {
        std::thread::scope(|scope| {
            // Parts wait for whoever takes them, so that they don't pile up.
            let (sender, receiver) = sync_channel(1);
            let control = &control;
            scope.spawn(move || {
                let mut sink = |part| {
                    let gone = |_| Error::new(ErrorKind::Interrupted, "stopped");
                    sender.send(Event::Part(part)).map_err(gone)
                };
                let result = run_scan(views, request, range, control, &mut sink);
                // The receiver waits until this is sent.
                let _ = sender.send(Event::End(result));
            });
            let mut failure = None;
            let mut last = Instant::now();
            let result = loop {
                let event = receiver.recv_timeout(TICK);
                let late = last.elapsed() >= TICK;
                let mut attempt = Ok(());
                match event {
                    Ok(Event::End(result)) => break result,
                    Ok(Event::Part(part)) if failure.is_none() => {
                        attempt = Python::attach(|py| take(py, part));
                    }
                    Ok(Event::Part(_)) | Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        break Err(Error::new(ErrorKind::Internal, "the scan ended without a result"));
                    }
                }
                if attempt.is_ok() && failure.is_none() && late {
                    last = Instant::now();
                    attempt = Python::attach(tick);
                }
                if let Err(error) = attempt {
                    control.stop.store(true, Ordering::Relaxed);
                    failure = Some(error);
                }
            };
            match failure {
                Some(error) => Err(Failure::Python(error)),
                None => result.map_err(Failure::Scan),
            }
        })
    })
}
