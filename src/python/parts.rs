//! Parts of a scan as dicts of NumPy arrays, the form in which they are written to files and sent.
//!
//! For Q queries (of the part), B kernels and G groups present in the segment:
//!
//! | key | array |
//! |---|---|
//! | `place` | uint64 (4,): segment, first query, Q, B |
//! | `groups`, `group_rows`, `group_weights` | uint32, uint64, float64 (G,): codes ascending |
//! | `max`, `sum`, `sum_sq` | float64 (G · Q · B,): the log sums, [group][query][kernel] |
//! | `excluded_at`, `excluded_rows`, `excluded_weights` | uint64 (position of the group · Q + query), uint64, float64: only where rows were left out |
//! | `duplicates_at`, `duplicates` | uint32 (query of the part), uint64: only where there are some |
//! | `max_projection` | float32 (Q,), −∞ where not asked for |
//! | `row_sum` | float64 (d,); empty where not asked for and in parts that don't start at query 0 |
//! | `neighbor_counts` | uint32 (Q,); empty where none were asked for |
//! | `neighbor_rows`, `neighbor_sq_distances` | uint64, float64: all queries' one after the other |

use numpy::{Element, PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::errors::to_python;
use crate::error::{Error, ErrorKind};
use crate::logsum::LogSum;
use crate::scan::reduce::{Part, Sums};
use crate::topk::Neighbor;

/// A part as arrays.
pub fn to_dict(py: Python<'_>, part: Part) -> PyResult<Bound<'_, PyDict>> {
    let sums = part.sums;
    let (queries, kernels) = (sums.queries(), sums.kernels());
    let place = [part.segment, part.first_query, queries, kernels].map(|value| value as u64);
    let mut excluded = (Vec::new(), Vec::new(), Vec::new());
    for (position, group) in sums.groups.values().enumerate() {
        for (&query, &(rows, weight)) in &group.excluded {
            excluded.0.push((position * queries + query as usize) as u64);
            excluded.1.push(rows);
            excluded.2.push(weight);
        }
    }
    let duplicates: Vec<(u32, u64)> =
        (0_u32..).zip(sums.duplicates.iter().copied()).filter(|&(_, count)| count > 0).collect();
    let each = |value: fn(&LogSum) -> f64| -> Vec<f64> {
        sums.groups.values().flat_map(|group| group.sums.iter().map(value)).collect()
    };
    let neighbors = || part.neighbors.iter().flatten();
    let dict = PyDict::new(py);
    dict.set_item("place", PyArray1::from_slice(py, &place))?;
    dict.set_item("groups", PyArray1::from_iter(py, sums.groups.keys().copied()))?;
    dict.set_item("group_rows", PyArray1::from_iter(py, sums.groups.values().map(|group| group.rows)))?;
    dict.set_item("group_weights", PyArray1::from_iter(py, sums.groups.values().map(|group| group.weight)))?;
    dict.set_item("max", PyArray1::from_vec(py, each(|sum| sum.max)))?;
    dict.set_item("sum", PyArray1::from_vec(py, each(|sum| sum.sum)))?;
    dict.set_item("sum_sq", PyArray1::from_vec(py, each(|sum| sum.sum_sq)))?;
    dict.set_item("excluded_at", PyArray1::from_vec(py, excluded.0))?;
    dict.set_item("excluded_rows", PyArray1::from_vec(py, excluded.1))?;
    dict.set_item("excluded_weights", PyArray1::from_vec(py, excluded.2))?;
    dict.set_item("duplicates_at", PyArray1::from_iter(py, duplicates.iter().map(|&(query, _)| query)))?;
    dict.set_item("duplicates", PyArray1::from_iter(py, duplicates.iter().map(|&(_, count)| count)))?;
    let counts = part.neighbors.iter().map(|found| found.len() as u32);
    dict.set_item("neighbor_counts", PyArray1::from_iter(py, counts))?;
    let rows: Vec<u64> = neighbors().map(|neighbor| neighbor.row).collect();
    let distances: Vec<f64> = neighbors().map(|neighbor| neighbor.sq_distance).collect();
    dict.set_item("neighbor_rows", PyArray1::from_vec(py, rows))?;
    dict.set_item("neighbor_sq_distances", PyArray1::from_vec(py, distances))?;
    dict.set_item("max_projection", PyArray1::from_vec(py, sums.max_projection))?;
    dict.set_item("row_sum", PyArray1::from_vec(py, sums.row_sum))?;
    Ok(dict)
}

/// A part from its arrays.
///
/// # Errors
/// `ShapeError` where an array is missing, or its type or length does not fit the others.
pub fn from_dict(dict: &Bound<'_, PyDict>, kernels: usize) -> PyResult<Part> {
    let place: Vec<usize> = array::<u64>(dict, "place")?.into_iter().map(|value| value as usize).collect();
    let &[segment, first_query, queries, of_kernels] = place.as_slice() else {
        return Err(unfit(dict, "place"));
    };
    if of_kernels != kernels {
        return Err(unfit(dict, "place"));
    }
    let groups = array::<u32>(dict, "groups")?;
    let rows = sized::<u64>(dict, "group_rows", groups.len())?;
    let weights = sized::<f64>(dict, "group_weights", groups.len())?;
    let size = queries.checked_mul(kernels).ok_or_else(|| unfit(dict, "place"))?;
    let cells = size.checked_mul(groups.len()).ok_or_else(|| unfit(dict, "groups"))?;
    let max = sized::<f64>(dict, "max", cells)?;
    let sum = sized::<f64>(dict, "sum", cells)?;
    let sum_sq = sized::<f64>(dict, "sum_sq", cells)?;
    let mut sums = Sums::empty(queries, kernels);
    for (position, &code) in groups.iter().enumerate() {
        let group = sums.group(code);
        (group.rows, group.weight) = (rows[position], weights[position]);
        for (at, into) in (position * size..).zip(&mut group.sums) {
            *into = LogSum { max: max[at], sum: sum[at], sum_sq: sum_sq[at] };
        }
    }
    let at = array::<u64>(dict, "excluded_at")?;
    let rows = sized::<u64>(dict, "excluded_rows", at.len())?;
    let weights = sized::<f64>(dict, "excluded_weights", at.len())?;
    for ((at, rows), weight) in at.into_iter().zip(rows).zip(weights) {
        let position = (at as usize).checked_div(queries).filter(|&position| position < groups.len());
        let code = groups[position.ok_or_else(|| unfit(dict, "excluded_at"))?];
        sums.group(code).excluded.insert((at as usize % queries) as u32, (rows, weight));
    }
    let at = array::<u32>(dict, "duplicates_at")?;
    let counts = sized::<u64>(dict, "duplicates", at.len())?;
    for (query, count) in at.into_iter().zip(counts) {
        *sums.duplicates.get_mut(query as usize).ok_or_else(|| unfit(dict, "duplicates_at"))? = count;
    }
    sums.max_projection = sized::<f32>(dict, "max_projection", queries)?;
    sums.row_sum = array::<f64>(dict, "row_sum")?;

    let counts = array::<u32>(dict, "neighbor_counts")?;
    let total: usize = counts.iter().map(|&count| count as usize).sum();
    let rows = sized::<u64>(dict, "neighbor_rows", total)?;
    let distances = sized::<f64>(dict, "neighbor_sq_distances", total)?;
    let mut found = rows.into_iter().zip(distances).map(|(row, sq_distance)| Neighbor { sq_distance, row });
    let neighbors = counts.iter().map(|&count| found.by_ref().take(count as usize).collect()).collect();
    Ok(Part { segment, first_query, sums, neighbors })
}

fn unfit(dict: &Bound<'_, PyDict>, key: &str) -> PyErr {
    let message = format!("a part of a scan whose {key:?} is missing or does not fit");
    to_python(dict.py(), &Error::new(ErrorKind::Shape, message))
}

fn array<T: Element + Copy>(dict: &Bound<'_, PyDict>, key: &str) -> PyResult<Vec<T>> {
    let value = dict.get_item(key)?.ok_or_else(|| unfit(dict, key))?;
    let array = value.cast::<PyArray1<T>>().map_err(|_| unfit(dict, key))?;
    Ok(array.try_readonly()?.as_array().to_vec())
}

fn sized<T: Element + Copy>(dict: &Bound<'_, PyDict>, key: &str, len: usize) -> PyResult<Vec<T>> {
    let values = array(dict, key)?;
    if values.len() == len { Ok(values) } else { Err(unfit(dict, key)) }
}
