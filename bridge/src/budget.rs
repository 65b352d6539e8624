//! Budgets as a tree: what a branch uses, all branches above it use too.
//!
//! A call reserves the most that it may use, in its branch and all above, before it is sent; when it
//! ends the reservation is replaced by what it used. So the children of a fork draw on what their
//! parent has left, whoever comes first, and together never on more.

use std::collections::BTreeMap;

use ratoon_bridge_api::amount::{Amount, Limits};

/// A run's branches.
#[derive(Debug, Default)]
pub struct Tree(BTreeMap<String, Node>);

/// One branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The branch above.
    pub parent: Option<String>,
    /// What it may use.
    pub limits: Limits,
    /// What it and its children have used.
    pub spent: Amount,
    /// What calls on their way may still use.
    pub reserved: Amount,
}

impl Tree {
    /// Adds a branch that has used nothing. Its parent must be there already: so there is no circle.
    pub fn add(&mut self, branch: &str, parent: Option<&str>, limits: Limits) {
        debug_assert!(parent.is_none_or(|parent| self.0.contains_key(parent)));
        self.0.insert(
            branch.to_owned(),
            Node {
                parent: parent.map(str::to_owned),
                limits,
                spent: Amount::default(),
                reserved: Amount::default(),
            },
        );
    }

    /// A branch.
    #[must_use]
    pub fn get(&self, branch: &str) -> Option<&Node> {
        self.0.get(branch)
    }

    /// All branches by name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Node)> {
        self.0.iter()
    }

    /// What a branch can still reserve: the least of what is left in it and in all above. A branch
    /// that is not there can reserve nothing.
    #[must_use]
    pub fn left(&self, branch: &str) -> Amount {
        self.least_above(branch, |node| node.spent.plus(node.reserved))
    }

    /// The limits in a branch and all above without what `used` says of each.
    fn least_above(&self, branch: &str, used: impl Fn(&Node) -> Amount) -> Amount {
        let mut left = if self.0.contains_key(branch) {
            Limits::default().ceiling()
        } else {
            Amount::default()
        };
        let mut next = self.0.get(branch);
        while let Some(node) = next {
            left = left.least(node.limits.ceiling().minus(used(node)));
            next = node.parent.as_ref().and_then(|parent| self.0.get(parent));
        }
        left
    }

    /// Whether money is limited for a branch: then a model needs a price.
    #[must_use]
    pub fn counts_money(&self, branch: &str) -> bool {
        let mut next = self.0.get(branch);
        while let Some(node) = next {
            if node.limits.cost_microusd.is_some() {
                return true;
            }
            next = node.parent.as_ref().and_then(|parent| self.0.get(parent));
        }
        false
    }

    /// Puts `amount` aside, or names what is short.
    ///
    /// # Errors
    /// What there is too little of; nothing is put aside then.
    pub fn reserve(&mut self, branch: &str, amount: Amount) -> Result<(), Short> {
        let left = self.left(branch);
        // What may come back: a call that is on its way is one call, whatever becomes of it.
        let unspent = self.least_above(branch, |node| Amount {
            calls: node.spent.calls.saturating_add(node.reserved.calls),
            ..node.spent
        });
        let rows = |of: Amount| {
            [
                ("calls", amount.calls, of.calls),
                ("input tokens", amount.input_tokens, of.input_tokens),
                ("output tokens", amount.output_tokens, of.output_tokens),
                ("microdollars", amount.cost_microusd, of.cost_microusd),
            ]
        };
        let lacks = |(_, wanted, left): &(&str, u64, u64)| wanted > left;
        if let Some((what, wanted, left)) = rows(left).into_iter().find(lacks) {
            return Err(Short {
                what,
                wanted,
                left,
                for_now: !rows(unspent).iter().any(lacks),
            });
        }
        self.each_above(branch, |node| node.reserved = node.reserved.plus(amount));
        Ok(())
    }

    /// Replaces a reservation by what was used; it may be more, if a provider counts more.
    pub fn settle(&mut self, branch: &str, reserved: Amount, used: Amount) {
        self.each_above(branch, |node| {
            node.reserved = node.reserved.minus(reserved);
            node.spent = node.spent.plus(used);
        });
    }

    fn each_above(&mut self, branch: &str, mut change: impl FnMut(&mut Node)) {
        let mut next = Some(branch.to_owned());
        while let Some(node) = next.and_then(|name| self.0.get_mut(&name)) {
            change(node);
            next = node.parent.clone();
        }
    }
}

/// There is not enough left.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the budget is {}: a call needs up to {wanted} {what}, and {left} are left",
    if *.for_now { "put aside for other calls, which may leave enough" } else { "used up" }
)]
pub struct Short {
    what: &'static str,
    wanted: u64,
    left: u64,
    /// It would be enough if the calls that are on their way used nothing.
    pub for_now: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(output_tokens: u64) -> Amount {
        Amount {
            calls: 1,
            output_tokens,
            ..Amount::default()
        }
    }

    fn limit(output_tokens: u64) -> Limits {
        Limits {
            output_tokens: Some(output_tokens),
            ..Limits::default()
        }
    }

    fn family() -> Tree {
        let mut tree = Tree::default();
        tree.add("main", None, limit(100));
        tree.add("a", Some("main"), limit(80));
        tree.add("b", Some("main"), Limits::default());
        tree.add("aa", Some("a"), Limits::default());
        tree
    }

    #[test]
    fn children_draw_on_what_their_parent_has_left() {
        let mut tree = family();
        tree.reserve("aa", tokens(60)).expect("there is enough");
        assert_eq!(tree.left("a").output_tokens, 20);
        assert_eq!(tree.left("b").output_tokens, 40);
        let short = tree.reserve("b", tokens(41)).unwrap_err();
        assert_eq!(
            short.to_string(),
            "the budget is put aside for other calls, which may leave enough: a call needs up to 41 output tokens, and 40 are left"
        );
        assert!(short.for_now);
        let short = tree.reserve("b", tokens(101)).unwrap_err();
        assert_eq!(
            short.to_string(),
            "the budget is used up: a call needs up to 101 output tokens, and 40 are left"
        );
        tree.reserve("b", tokens(40)).expect("just enough");
        tree.settle("aa", tokens(60), tokens(10));
        assert_eq!(tree.left("b").output_tokens, 50);
        assert_eq!(tree.get("main").expect("there").spent, tokens(10));
    }

    #[test]
    fn what_calls_on_their_way_hold_may_come_back_but_not_their_number() {
        let mut tree = Tree::default();
        let limits = Limits {
            calls: Some(2),
            ..limit(50)
        };
        tree.add("main", None, limits);
        tree.reserve("main", tokens(40)).expect("enough");
        assert!(tree.reserve("main", tokens(20)).unwrap_err().for_now);
        tree.reserve("main", tokens(1)).expect("enough");
        let short = tree.reserve("main", tokens(1)).unwrap_err();
        assert!(!short.for_now, "{short}");
        tree.settle("main", tokens(40), tokens(40));
        assert!(!tree.reserve("main", tokens(20)).unwrap_err().for_now);
    }

    #[test]
    fn a_branch_that_is_not_there_can_reserve_nothing() {
        assert!(family().reserve("c", tokens(0)).is_err());
    }

    /// Whatever happens in whatever order: nobody's spent and reserved is over a limit, and a
    /// parent's is the sum of all below.
    #[test]
    fn no_order_of_calls_gets_more_than_the_budget() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let mut tree = family();
            let mut open: Vec<(&str, Amount)> = Vec::new();
            let mut used = 0;
            for _ in 0..60 {
                if random.bool() || open.is_empty() {
                    let branch = ["main", "a", "b", "aa"][random.usize(..4)];
                    let amount = tokens(random.u64(0..40));
                    let fits = tree.left(branch).output_tokens >= amount.output_tokens;
                    assert_eq!(tree.reserve(branch, amount).is_ok(), fits);
                    if fits {
                        open.push((branch, amount));
                    }
                } else {
                    let (branch, amount) = open.swap_remove(random.usize(..open.len()));
                    let part = tokens(random.u64(0..=amount.output_tokens));
                    tree.settle(branch, amount, part);
                    used += part.output_tokens;
                }
                for (name, node) in tree.iter() {
                    let total = node.spent.plus(node.reserved).output_tokens;
                    assert!(total <= node.limits.ceiling().output_tokens, "{name}");
                }
                let main = tree.get("main").expect("there");
                let reserved: u64 = open.iter().map(|(_, amount)| amount.output_tokens).sum();
                assert_eq!(main.reserved.output_tokens, reserved);
                assert_eq!(main.spent.output_tokens, used);
            }
        }
    }
}
